"""Configuration of the bottom-up-attention Faster R-CNN (Anderson et al. 2018, arXiv 1707.07998)."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_faster_rcnn.FasterRCNNConfig",
    "AutoModel": "modeling_faster_rcnn.FasterRCNNForRegionFeatures",
}

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@strict
class FasterRCNNConfig(PreTrainedConfig):
    r"""
    Configuration of a Faster R-CNN on a ResNet-C4: the first three stages of a ResNet make a map at stride 16, regions
    are proposed and pooled on it, and the fourth stage turns each into a feature vector. The defaults are those of the
    published detector of 1,600 objects and 400 attributes of Visual Genome (`unc-nlp/frcnn-vg-finetuned`).

    Args:
        depth (`50`, `101` or `152`, *optional*, defaults to 101):
            Layers of the ResNet.
        stem_channels (`int`, *optional*, defaults to 64):
            Channels of the first convolution.
        res2_channels (`int`, *optional*, defaults to 256):
            Channels of the first stage; each further stage has twice as many.
        num_groups, width_per_group (`int`, *optional*, defaults to 1 and 64):
            Groups of the 3 x 3 convolutions of the first stage, and channels of each.
        stride_in_1x1 (`bool`, *optional*, defaults to `True`):
            Whether a block strides in its first convolution (Caffe, MSRA) or in its 3 x 3 one.
        caffe_max_pool (`bool`, *optional*, defaults to `True`):
            Whether the pooling after the stem has no padding and rounds up, as in Caffe.
        res5_halves (`bool`, *optional*, defaults to `False`):
            Whether the last stage halves the pooled regions. The published detector dilates its convolutions instead.
        rpn_channels (`int`, *optional*, defaults to 512):
            Channels of the region proposal network.
        anchor_sizes (`list[float]`, *optional*, defaults to `[64, 128, 256, 512]`):
            Square roots of the anchors' areas, in pixels.
        anchor_aspect_ratios (`list[float]`, *optional*, defaults to `[0.5, 1.0, 2.0]`):
            Heights of the anchors, as multiples of their widths.
        anchor_offset (`float`, *optional*, defaults to 0.0):
            Where in its cell an anchor is centred, in cells.
        rpn_nms_threshold (`float`, *optional*, defaults to 0.7):
            Proposals that overlap more are suppressed.
        pre_nms_top_k, post_nms_top_k (`int`, *optional*, defaults to 6000 and 300):
            Proposals that are considered, and that are kept, of each image.
        rpn_box_weights (`list[float]`, *optional*, defaults to `[1, 1, 1, 1]`):
            What the deltas of anchors are divided by: of x, y, width and height.
        min_proposal_size (`float`, *optional*, defaults to 0.0):
            Proposals whose width or height is not above it are dropped.
        pooler_size (`int`, *optional*, defaults to 14):
            Bins of each side that a region is pooled to.
        num_classes (`int`, *optional*, defaults to 1600):
            Object classes, without background.
        num_attributes (`int`, *optional*, defaults to 400):
            Attribute classes; 0 leaves the head of attributes out.
        box_weights (`list[float]`, *optional*, defaults to `[10, 10, 5, 5]`):
            What the deltas of proposals are divided by.
        class_agnostic_boxes (`bool`, *optional*, defaults to `False`):
            Whether all classes share one box.
        nms_thresholds (`list[float]`, *optional*, defaults to `[0.3]`):
            Overlaps above which regions are suppressed: the first one that leaves `min_regions` of them.
        min_regions, max_regions (`int`, *optional*, defaults to 36 and 36):
            How many regions of an image are wanted, at least and at most.
        min_score (`float`, *optional*, defaults to 0.0):
            Regions whose score is not above it are left out, as long as `min_regions` remain.
        num_sampled_proposals (`int`, *optional*, defaults to 128):
            Proposals of each image that are learned of, at most.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: a value of the wrong type, or out of range.
    """

    model_type = "faster_rcnn"

    depth: Literal[50, 101, 152] = 101
    stem_channels: int = 64
    res2_channels: int = 256
    num_groups: int = 1
    width_per_group: int = 64
    stride_in_1x1: bool = True
    caffe_max_pool: bool = True
    res5_halves: bool = False
    rpn_channels: int = 512
    anchor_sizes: list[float | int] | tuple[float | int, ...] = (64.0, 128.0, 256.0, 512.0)
    anchor_aspect_ratios: list[float | int] | tuple[float | int, ...] = (0.5, 1.0, 2.0)
    anchor_offset: float | int = 0.0
    rpn_nms_threshold: float | int = 0.7
    pre_nms_top_k: int = 6000
    post_nms_top_k: int = 300
    rpn_box_weights: list[float | int] | tuple[float | int, ...] = (1.0, 1.0, 1.0, 1.0)
    min_proposal_size: float | int = 0.0
    pooler_size: int = 14
    num_classes: int = 1600
    num_attributes: int = 400
    box_weights: list[float | int] | tuple[float | int, ...] = (10.0, 10.0, 5.0, 5.0)
    class_agnostic_boxes: bool = False
    nms_thresholds: list[float | int] | tuple[float | int, ...] = (0.3,)
    min_regions: int = 36
    max_regions: int = 36
    min_score: float | int = 0.0
    num_sampled_proposals: int = 128

    def __post_init__(self, **kwargs):
        kwargs["auto_map"] = AUTO_MAP | (kwargs.get("auto_map") or {})
        super().__post_init__(**kwargs)

    @property
    def stage_blocks(self) -> tuple[int, ...]:
        """Blocks of the four stages."""
        return BLOCKS[self.depth]

    @property
    def region_feature_size(self) -> int:
        """Length of a region's feature vector: the channels of the fourth stage."""
        return 8 * self.res2_channels

    @classmethod
    def from_original(cls, values: dict[str, Any], **kwargs) -> "FasterRCNNConfig":
        """
        From the configuration of the published checkpoint.

        Args:
            values: Sections of names and values, of `config.yaml` or `config.json`, in lower case.
            kwargs: Values that take precedence.

        Raises:
            `ValueError`: a value is missing, or stands for an architecture that this model has not.
        """

        def read(section: str, name: str) -> Any:
            if name not in values.get(section, {}):
                raise ValueError(f"The configuration has no {section}.{name}, only the sections {sorted(values)}.")
            return values[section][name]

        for section, name, expected in (
            ("resnets", "norm", "BN"),
            ("resnets", "out_features", ["res4"]),
            ("rpn", "in_features", ["res4"]),
            ("roi_heads", "in_features", ["res4"]),
            ("resnets", "res5_dilation", 1),
        ):
            if read(section, name) != expected:
                raise ValueError(f"{section}.{name}: expected {expected}, got {read(section, name)}.")
        fields = {
            "depth": read("resnets", "depth"),
            "stem_channels": read("resnets", "stem_out_channels"),
            "res2_channels": read("resnets", "res2_out_channels"),
            "num_groups": read("resnets", "num_groups"),
            "width_per_group": read("resnets", "width_per_group"),
            "stride_in_1x1": read("resnets", "stride_in_1x1"),
            "caffe_max_pool": read("model", "max_pool"),
            "res5_halves": read("roi_box_head", "res5halve"),
            "rpn_channels": read("proposal_generator", "hidden_channels"),
            "anchor_sizes": read("anchor_generator", "sizes")[0],
            "anchor_aspect_ratios": read("anchor_generator", "aspect_ratios")[0],
            "anchor_offset": read("anchor_generator", "offset"),
            "rpn_nms_threshold": read("rpn", "nms_thresh"),
            "pre_nms_top_k": read("rpn", "pre_nms_topk_test"),
            "post_nms_top_k": read("rpn", "post_nms_topk_test"),
            "rpn_box_weights": read("rpn", "bbox_reg_weights"),
            "min_proposal_size": read("proposal_generator", "min_size"),
            "pooler_size": read("roi_box_head", "pooler_resolution"),
            "num_classes": read("roi_heads", "num_classes"),
            "num_attributes": read("roi_box_head", "num_attrs") if read("roi_box_head", "attr") else 0,
            "box_weights": read("roi_box_head", "bbox_reg_weights"),
            "class_agnostic_boxes": read("roi_box_head", "cls_agnostic_bbox_reg"),
            "nms_thresholds": read("roi_heads", "nms_thresh_test"),
        }
        for name in ("min_detections", "max_detections"):
            if name not in values:
                raise ValueError(f"The configuration has no {name}.")
        fields |= {"min_regions": values["min_detections"], "max_regions": values["max_detections"]}
        return cls(**(fields | kwargs))

    def validate_architecture(self):
        """Refuses values that cannot work (called at construction and when saving)."""
        for name in (
            *("stem_channels", "res2_channels", "num_groups", "width_per_group", "rpn_channels", "pre_nms_top_k"),
            *("post_nms_top_k", "pooler_size", "num_classes", "max_regions", "num_sampled_proposals"),
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("num_attributes", "min_regions"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.min_regions > self.max_regions:
            raise ValueError(
                f"`min_regions` must not be above `max_regions`, got {self.min_regions} and {self.max_regions}."
            )
        for name in ("anchor_sizes", "anchor_aspect_ratios", "nms_thresholds"):
            if len(getattr(self, name)) == 0 or min(getattr(self, name)) <= 0:
                raise ValueError(f"`{name}` must be positive numbers, at least one, got {getattr(self, name)}.")
        for name in ("rpn_box_weights", "box_weights"):
            if len(getattr(self, name)) != 4 or min(getattr(self, name)) <= 0:
                raise ValueError(f"`{name}` must be four positive numbers, got {getattr(self, name)}.")


FasterRCNNConfig.register_for_auto_class()

__all__ = ["FasterRCNNConfig"]
