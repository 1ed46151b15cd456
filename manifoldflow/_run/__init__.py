"""The course of a run from save to save: its legs, its reports, its journal, and its integral."""

from manifoldflow._run._forms import (
    AbstractVectorField as AbstractVectorField,
    check_form as check_form,
    Form as Form,
    form_of as form_of,
)
from manifoldflow._run._legs import (
    AdaptiveSteps as AdaptiveSteps,
    EqualSteps as EqualSteps,
    next_step as next_step,
    over_legs as over_legs,
)
from manifoldflow._run._recorded import (
    AbstractRun as AbstractRun,
    check_concrete as check_concrete,
    Leg as Leg,
    recorded as recorded,
    Save as Save,
)
from manifoldflow._run._reports import (
    announce as announce,
    checked_observables as checked_observables,
    meter_of as meter_of,
    observed as observed,
    Report as Report,
    row_reports as row_reports,
    share_of_decades as share_of_decades,
    show as show,
    tell as tell,
)
from manifoldflow._run._table import LiveTable as LiveTable
from manifoldflow._run._until import Stationary as Stationary, stops_at as stops_at, Until as Until
