"""Handwritten digits that come with scikit-learn: real data without a download."""

import importlib.util
import pathlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from manifoldflow._boundary import checked

NUM_TRAIN = 1000


@checked
def digits(
    num_examples: int | None = None, *, test: bool = False, seed: int = 0
) -> tuple[Float[Array, "N 64"], Float[Array, "N 10"]]:
    """Images and one-hot labels of 8×8 handwritten digits.

    The 1,797 images are shuffled once; 1,000 are for training, 797 for testing.

    Args:
        num_examples: the number of images; by default all.
        test: take them from the test part in place of the training part.
        seed: of the shuffle.

    Returns:
        Images (N, 64) with pixels in [0, 1] and labels (N, 10), in JAX's default float.

    Raises:
        ImportError: scikit-learn is missing; `pip install manifoldflow[demo]`.
        ValueError: more examples than there are.

    Examples:
        >>> import manifoldflow as mf
        >>> images, labels = mf.models.digits(num_examples=60)
        >>> print(images.shape, labels.shape, labels[0].sum())
        (60, 64) (60, 10) 1.0
    """
    images, labels = _read()
    # NumPy's generator: the split must not depend on JAX's version or device.
    order = np.random.default_rng(seed).permutation(len(images))
    part = order[NUM_TRAIN:] if test else order[:NUM_TRAIN]
    if num_examples is not None and not 1 <= num_examples <= len(part):
        raise ValueError(
            f"digits: num_examples must be between 1 and {len(part)}; got {num_examples}."
        )
    part = part[:num_examples]
    return jnp.asarray(images[part] / 16.0), jnp.asarray(np.eye(10)[labels[part]])


def _read() -> tuple[Float[np.ndarray, "1797 64"], Int[np.ndarray, " 1797"]]:
    """All images and labels, from the file in scikit-learn: its import takes a second or two."""
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise ImportError(
            "models.digits needs scikit-learn: python -m pip install 'manifoldflow[demo]'"
        )
    path = pathlib.Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    if path.is_file():
        rows = np.loadtxt(path, delimiter=",")
        return rows[:, :-1], rows[:, -1].astype(int)
    from sklearn.datasets import load_digits  # where a later version keeps it elsewhere

    images, labels = load_digits(return_X_y=True)
    return np.asarray(images), np.asarray(labels)
