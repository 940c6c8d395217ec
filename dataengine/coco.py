"""The 133 classes of COCO panoptic segmentation, in detectron2's contiguous order: 80 things, then 53 stuff classes."""

from __future__ import annotations

import numpy as np

# Names and colours of cocodataset/panopticapi's panoptic_coco_categories.json, sorted by category id within each part.
_CLASSES = """
person dc143c, bicycle 770b20, car 00008e, motorcycle 0000e6, airplane 6a00e4, bus 003c64, train 005064,
truck 000046, boat 0000c0, traffic light faaa1e, fire hydrant 64aa1e, stop sign dcdc00, parking meter af74af,
bench fa001e, bird a52a2a, cat ff4dff, dog 00e2fc, horse b6b6ff, sheep 005200, cow 78a69d, elephant 6e4c00,
bear ae39ff, zebra c76400, giraffe 480076, backpack ffb3f0, umbrella 007d5c, handbag d10097, tie bcd0b6,
suitcase 00dcb0, frisbee ff63a4, skis 5c0049, snowboard 8581ff, sports ball 4eb4ff, kite 00e400,
baseball bat aefff3, baseball glove 2d59ff, skateboard 868667, surfboard 9194ae, tennis racket ffd0ba,
bottle c5e2ff, wine glass ab8601, cup 6d3f36, fork cf8aff, knife 97005f, spoon 09503d, bowl 546933,
banana 4a4169, apple a6c466, sandwich d0c3d2, orange ff6d41, broccoli 008f95, carrot b300c2, hot dog d1636a,
pizza 057900, donut e3ffcd, cake 93bad0, chair 994501, couch 035fa1, potted plant a3ff00, bed 7700aa,
dining table 00b6c7, toilet 00a578, tv b78258, laptop 5f2000, mouse 827287, remote 6e8185, keyboard a64a76,
cell phone db8eb9, microwave 4fd272, oven b25a3e, toaster 41460f, sink 7fa773, refrigerator 3b696a,
book 8e6c2d, clock c4ac00, vase 5f3650, scissors 804cff, teddy bear c93901, hair drier f6007a,
toothbrush bfa2d0, banner ffff80, blanket 93d3cb, bridge 966464, cardboard a8abac, counter 9270c6,
curtain d2aa64, door-stuff 5c8859, floor-wood da58b8, flower f18100, fruit d911ff, gravel 7c4ab5, house 464646,
light ffe4ff, mirror-stuff 9ad000, net c1005c, pillow 4c5b71, platform ffb4c3, playingfield 6a9ab0,
railroad e6968c, river 3c8fff, road 804080, roof 5c5237, sand fed47c, sea 494dae, shelf ffa062, snow ffffff,
stairs 68546d, tent a9a483, towel e1c7ff, wall-brick 89364a, wall-stone 879edf, wall-tile 07f6e7,
wall-wood 6bffc8, water-other 3a2995, window-blind b7798e, window-other ff4961, tree-merged 6b8e23,
fence-merged be9999, ceiling-merged 928b8d, sky-other-merged 4682b4, cabinet-merged 86c79c,
table-merged d1e28c, floor-other-merged 60246c, pavement-merged 606060, mountain-merged 40aa40,
grass-merged 98fb98, dirt-merged d0e5e4, paper-merged cebaab, food-other-merged 98a140,
building-other-merged 747000, rock-merged 00728f, wall-other-merged 66669c, rug-merged fa8dff
"""
_PAIRS = tuple(entry.rsplit(maxsplit=1) for entry in _CLASSES.replace("\n", " ").split(","))

UNLABELLED = 255
"""The id of a pixel without a class."""

NAMES: tuple[str, ...] = tuple(name.strip() for name, _ in _PAIRS)
"""The class names by id 0..132."""

THINGS: tuple[str, ...] = NAMES[:80]
"""The names of countable objects, which are also the classes of COCO detection, by id 0..79."""

COLOURS = np.zeros((256, 3), dtype=np.uint8)
"""uint8 (256, 3): the RGB colour for every value of an 8-bit map, black where there is no class."""
COLOURS[: len(NAMES)] = [list(bytes.fromhex(code)) for _, code in _PAIRS]


def name(class_id: int) -> str:
    """The name of an id as it occurs in a map: a class, or "unlabelled"."""
    return NAMES[class_id] if class_id < len(NAMES) else "unlabelled"


def colour(class_id: int) -> tuple[int, int, int]:
    """The colour of an id as it occurs in a map; unlabelled is black."""
    red, green, blue = COLOURS[class_id].tolist()
    return red, green, blue
