"""Pictures of attention weights, by matplotlib; shaded text also in a terminal and in a notebook.

The extra ``plot`` brings matplotlib. Importing this module does not load it, and `text` needs it only to draw.

A weight is as dark as it is large: the scale begins at 0, ends at the largest weight of the picture or at `vmax`, and
is drawn beside it. NaN has a colour of its own. `blocks` draws masks, block by block.
"""

from fastattn.plot.blocks import blocks
from fastattn.plot.lines import links
from fastattn.plot.maps import heads, heatmap
from fastattn.plot.shading import ShadedText, text

__all__ = ["ShadedText", "blocks", "heads", "heatmap", "links", "text"]
