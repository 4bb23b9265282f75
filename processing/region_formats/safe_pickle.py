"""
Reads foreign pickles and `.npy` files without running anything that they contain.

A pickle is a program that may call any function it names. Here it may name seven things, those that region formats
need: numpy's constructors of arrays, scalars and dtypes (under the module names of numpy 1 and 2), the encoding of
bytes in old protocols, and `OrderedDict`. Each name stands for something of this file, so that no code of numpy's sees
the state that a pickle sets; everything else is refused by its name.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from typing import Any, BinaryIO

import numpy as np

# Numbers of fixed size and strings, as `numpy.dtype(...)` is called in pickles.
_PLAIN_DTYPE = re.compile(r"[biuf][1248]|[SU]\d{1,4}")
_LEAVES = (bool, int, float, complex, str, bytes, bytearray, np.generic, np.ndarray)


class _Dtype:
    """Stands for a dtype while a pickle is read. `dtype` is None for arrays of objects."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype | None):
        self.dtype = dtype

    def __setstate__(self, state: tuple):
        _, byte_order, *structure = state[:5]
        if byte_order not in ("<", ">", "|", "=") or structure != [None, None, None]:
            raise pickle.UnpicklingError("expected an array of numbers, got one of a structured dtype")
        if self.dtype is not None:
            self.dtype = self.dtype.newbyteorder(byte_order)


class _Array:
    """Stands for an array while a pickle is read; `value` is the array, or the list of objects in it."""

    __slots__ = ("value",)
    # Unhashable, so that it cannot be a key.
    __hash__ = None

    def __setstate__(self, state: tuple):
        _, shape, dtype, fortran_order, data = state
        if dtype.dtype is not None:
            self.value = _to_array(data, dtype, shape, "F" if fortran_order else "C")
        elif isinstance(data, list) and len(data) == math.prod(shape):
            self.value = data if shape else data[0]
        else:
            raise pickle.UnpicklingError(f"expected {math.prod(shape)} objects for shape {shape}")


def _to_array(data: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    if dtype.dtype is None:
        raise pickle.UnpicklingError("expected an array of objects as numpy pickles it")
    if isinstance(data, str):  # bytes of Python 2
        data = data.encode("latin1")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


class _Constructors:
    """
    What a pickle may call. A pickle may also set attributes of whatever it names; of bound methods, as these are then,
    it cannot.
    """

    def __init__(self, object_arrays: bool):
        self._object_arrays = object_arrays

    def reconstruct(self, array_type, shape, type_code) -> _Array:
        return _Array()  # All that counts follows in its state.

    def scalar(self, dtype: _Dtype, data: bytes | str) -> np.generic:
        return _to_array(data, dtype, (1,), "C")[0]

    def frombuffer(self, data, dtype: _Dtype, shape, order: str, axis_order=None) -> np.ndarray:
        if axis_order is not None:
            return _to_array(data, dtype, shape, "C").transpose(axis_order)
        return _to_array(data, dtype, shape, order)

    def dtype(self, code: str, align: bool = False, copy: bool = False) -> _Dtype:
        if self._object_arrays and code in ("O", "O8"):
            return _Dtype(None)
        if not _PLAIN_DTYPE.fullmatch(code):
            raise pickle.UnpicklingError(f"expected arrays of numbers or strings, got one of dtype {code!r}")
        return _Dtype(np.dtype(code))

    def encode(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"expected bytes in latin1, got {encoding!r}")
        return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, object_arrays: bool):
        # Python 2 had one type for bytes and text: latin1 keeps every byte of it.
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._resolved: dict[int, Any] = {}
        # Methods of this object instead would be a cycle, which keeps the pickle in memory until it is collected.
        constructors = _Constructors(object_arrays)
        self._admitted = {
            ("numpy._core.multiarray", "_reconstruct"): constructors.reconstruct,
            ("numpy._core.multiarray", "scalar"): constructors.scalar,
            ("numpy._core.numeric", "_frombuffer"): constructors.frombuffer,
            ("numpy", "dtype"): constructors.dtype,
            ("numpy", "ndarray"): object(),  # only ever an argument of _reconstruct
            ("_codecs", "encode"): constructors.encode,
            ("collections", "OrderedDict"): dict,
        }

    def find_class(self, module: str, name: str) -> Any:
        numpy_2_module = re.sub(r"^numpy\.core\.", "numpy._core.", module)
        if (numpy_2_module, name) not in self._admitted:
            raise pickle.UnpicklingError(
                f"expected plain containers, numbers, strings and numpy arrays, got {module}.{name}, which was not run"
            )
        return self._admitted[numpy_2_module, name]

    def resolve(self, value: Any) -> Any:
        """`value` with arrays in the place of what stands for them."""
        if value is None or isinstance(value, _LEAVES):
            return value
        if not isinstance(value, (dict, list, tuple, _Array)):
            raise pickle.UnpicklingError(f"expected plain containers, numbers, strings and arrays, got {value!r:.80}")
        # One object may stand in many places: without this memory, a small pickle could mean an endless walk.
        if id(value) not in self._resolved:
            self._resolved[id(value)] = None
            if isinstance(value, _Array):
                resolved = self.resolve(value.value)
            elif isinstance(value, dict):
                resolved = {key: self.resolve(item) for key, item in value.items()}
            else:
                resolved = type(value)(self.resolve(item) for item in value)
            self._resolved[id(value)] = resolved
        resolved = self._resolved[id(value)]
        if resolved is None:
            raise pickle.UnpicklingError("expected plain containers, got one that contains itself")
        return resolved


def safe_loads(data: bytes, object_arrays: bool = False) -> Any:
    """
    Unpickles dicts, lists, tuples, numbers, strings, bytes, None, and numpy arrays and scalars of numbers and
    strings, of any protocol and of Python 2 as well.

    Args:
        data (`bytes`): The pickle.
        object_arrays (`bool`, *optional*, defaults to `False`):
            Admits arrays of objects, given as the flat list of their objects, those without dimensions as the object
            itself. The objects are of the types above.

    Raises:
        `pickle.UnpicklingError`: the pickle names anything else (which is not imported and not run), or is damaged.
    """
    try:
        unpickler = _Unpickler(data, object_arrays)
        return unpickler.resolve(unpickler.load())
    except pickle.UnpicklingError:
        raise
    # Damaged bytes can be any program, and so raise anything.
    except Exception as error:
        raise pickle.UnpicklingError(f"damaged pickle ({type(error).__name__}: {error})") from error


def read_npy(file: BinaryIO, size: int) -> Any:
    """
    Reads a `.npy` file.

    Args:
        file (`BinaryIO`): At its beginning.
        size (`int`): Length of the whole file in bytes.

    Returns:
        The array; of an array of objects what [`safe_loads`] makes of it, so of `numpy.save(path, {...})` the dict.

    Raises:
        `ValueError`: the file is damaged, or shorter or longer than its header says.
        `pickle.UnpicklingError`: its objects are refused.
    """
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, fortran_order, dtype = read_header[np.lib.format.read_magic(file)](file)
    # The header is a Python literal, whose parser raises whatever damaged ones lead it to.
    except Exception as error:
        raise ValueError(f"damaged .npy header ({type(error).__name__}: {error})") from error
    if dtype.hasobject:
        return safe_loads(file.read(), object_arrays=True)
    expected, got = math.prod(shape) * dtype.itemsize, size - file.tell()
    if got != expected:
        raise ValueError(f"expected {expected} bytes for {dtype} of shape {shape}, got {got}")
    data = file.read(expected)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")
