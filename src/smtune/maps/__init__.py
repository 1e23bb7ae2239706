"""Where the blocks of a plan are: as a grid of layers and projections, and as a picture of it.

Below `tuner`, because an adapter's model card shows the picture.
"""
