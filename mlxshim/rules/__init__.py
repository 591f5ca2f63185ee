"""The rules: one file a family of operations. Importing a family registers its interceptions."""

import mlx.core as mx

from ..core.versions import MLX
from . import attention as attention
from . import axes as axes
from . import complex as complex
from . import control as control
from . import convolution as convolution
from . import diagonals as diagonals
from . import elementwise as elementwise
from . import experts as experts
from . import fourier as fourier
from . import fp8 as fp8
from . import indexing as indexing
from . import linalg as linalg
from . import losses as losses
from . import matmul as matmul
from . import norms as norms
from . import positions as positions
from . import qqmm as qqmm
from . import quantization as quantization
from . import quantized as quantized
from . import random as random
from . import reading as reading
from . import reshaping as reshaping
from . import rolls as rolls
from . import rows as rows
from . import running as running
from . import segmented as segmented
from . import slices as slices
from . import spectral as spectral
from . import truths as truths
from . import views as views

if hasattr(mx, "searchsorted"):
    from . import searching as searching
if MLX < (0, 32, 4):
    from . import sorting as sorting
else:
    from . import partitions as partitions
if MLX < (0, 32, 0):
    from . import plain_0_31 as plain_0_31
else:
    from . import extrema as extrema
