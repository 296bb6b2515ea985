"""DCTpS: layers with the weight alpha D + S, a fixed DCT matrix and a trainable sparse one (Price and Tanner 2021).

convert(model)         # in place; S of every layer is zero, to be masked and trained as any weight
...
materialize(model)     # in place; plain layers with alpha D + S in them
"""

from .convert import convert, materialize
from .layers import DCTConv1d, DCTConv2d, DCTConv3d, DCTLayer, DCTLinear, is_dct
from .transform import macs, matrix

__all__ = [
    "DCTConv1d",
    "DCTConv2d",
    "DCTConv3d",
    "DCTLayer",
    "DCTLinear",
    "convert",
    "is_dct",
    "macs",
    "materialize",
    "matrix",
]
