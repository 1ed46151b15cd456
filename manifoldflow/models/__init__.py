"""Worked problems: data and models on which the theory can be tried."""

from manifoldflow.models._digits import digits as digits
from manifoldflow.models._motor import KPhaseMotor as KPhaseMotor
