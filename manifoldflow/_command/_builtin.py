"""Data that come with scikit-learn."""

from manifoldflow._command._examples import Examples

BUILTIN = "digits", "iris", "wine", "diabetes"


def builtin(name: str) -> Examples:
    """All examples of one of `BUILTIN`.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            f"--data {name} needs scikit-learn: python -m pip install 'manifoldflow[demo]'"
        ) from error
    bunch = getattr(datasets, f"load_{name}")()
    columns = [str(column) for column in bunch.feature_names]
    return Examples(bunch.data, bunch.target, columns)
