"""The devices over which examples and parameters are spread."""

from manifoldflow._mesh._axes import (
    axes_in_force as axes_in_force,
    check_axis as check_axis,
    EXAMPLES as EXAMPLES,
    is_spread as is_spread,
    mesh as mesh,
    num_devices as num_devices,
    num_shares as num_shares,
    PARAMETERS as PARAMETERS,
    share_of as share_of,
)
from manifoldflow._mesh._cuts import (
    at_work as at_work,
    columns_cut as columns_cut,
    fits_one_message as fits_one_message,
    in_blocks as in_blocks,
    in_one as in_one,
    in_turn as in_turn,
    layer as layer,
    over_all as over_all,
    rows_and_widths_cut as rows_and_widths_cut,
    rows_cut as rows_cut,
    spread as spread,
    whole as whole,
)
from manifoldflow._mesh._placed import (
    as_auto as as_auto,
    no_mesh as no_mesh,
    placed as placed,
    shard_parameters as shard_parameters,
)
