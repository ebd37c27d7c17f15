"""What losses share that read the reference's own response to the prompt of each pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign.api import Batch, PluginError

if TYPE_CHECKING:
    from torch import Tensor


def of_reference_responses(batch: Batch, values: Tensor) -> Tensor:
    """Of the reference's own response to each pair's prompt; [N] -> [P].

    Raises PluginError where the loss does not declare that it reads them.
    """
    if "reference" not in batch.views:
        raise PluginError('the loss reads responses of the reference but does not declare "reference_responses"')
    return values[batch.views["reference"]]
