"""The public random directions of a kernel model.

Source: Rahimi and Recht, "Random Features for Large-Scale Kernel Machines", NIPS 2007; Box and Muller 1958.
Rules: a function of the manifest's seed, sizes and bandwidth alone; numpy only.
"""

import numpy as np
from numpy.typing import NDArray

from common.contract import Contract
from common.encoding import digest, u64
from common.methods import KernelSvm
from common.secagg.masks import apply_keystreams


def projection(model: KernelSvm, contract: Contract) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Directions [width, D], Gaussian of standard deviation 1 / bandwidth, and phases [D] in [0, 2 pi).

    Each from words w of the AES-256-CTR keystream of H("projection", seed), u = (w + 1/2) / 2^32.
    """
    count, width = model.random_features, contract.width
    words = np.zeros(2 * count * width + count, dtype="<u4")
    apply_keystreams(words, [digest("projection", u64(model.seed))])
    uniform = (words + 0.5) * 2.0**-32
    radii = np.sqrt(-2.0 * np.log(uniform[: count * width]))
    angles = 2.0 * np.pi * uniform[count * width : 2 * count * width]
    directions = (radii * np.cos(angles)).reshape(width, count) / model.bandwidth
    return directions, 2.0 * np.pi * uniform[2 * count * width :]
