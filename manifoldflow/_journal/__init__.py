"""The journal of a run in a file: the right run's, whole, and one at a time."""

from manifoldflow._journal._identity import (
    Identity as Identity,
    observables_of as observables_of,
    parts_of as parts_of,
    start_of as start_of,
)
from manifoldflow._journal._journal import Journal as Journal
from manifoldflow._journal._load import load_checkpoint as load_checkpoint
from manifoldflow._journal._programs import digest as digest, program as program
from manifoldflow._journal._stores import Place as Place, store_of as store_of
