"""What a computation will cost, and whether its assumptions hold."""

from manifoldflow.diagnostics._cost import (
    explain as explain,
    Explanation as Explanation,
    Plan as Plan,
    plan as plan,
)
