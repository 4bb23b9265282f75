"""Stands in for the configuration file that lies beside the modeling file on the Hub.

Saving a model copies the modeling file and what it imports relatively, this stand-in included; saving its
configuration then writes the real file over the copy.
"""

from configuration_interbert import InterBERTConfig

__all__ = ["InterBERTConfig"]
