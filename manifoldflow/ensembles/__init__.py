"""One function of a key over many keys and devices, and statistics of its values."""

from manifoldflow.ensembles._ensemble import ensemble as ensemble, member_keys as member_keys
from manifoldflow.ensembles._statistics import Statistics as Statistics, statistics as statistics
from manifoldflow.ensembles._weak import (
    Estimate as Estimate,
    extrapolate as extrapolate,
    weak_error as weak_error,
    weak_order as weak_order,
    WeakError as WeakError,
)
