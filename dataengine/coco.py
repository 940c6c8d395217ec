"""The 133 classes of COCO panoptic segmentation by contiguous id: 80 things, then 53 kinds of stuff."""

from __future__ import annotations

import colorsys

THINGS = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,"
    "wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,"
    "chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,"
    "toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
STUFF = (
    "banner,blanket,bridge,cardboard,counter,curtain,door-stuff,floor-wood,flower,fruit,gravel,house,light,"
    "mirror-stuff,net,pillow,platform,playingfield,railroad,river,road,roof,sand,sea,shelf,snow,stairs,tent,towel,"
    "wall-brick,wall-stone,wall-tile,wall-wood,water-other,window-blind,window-other,tree-merged,fence-merged,"
    "ceiling-merged,sky-other-merged,cabinet-merged,table-merged,floor-other-merged,pavement-merged,mountain-merged,"
    "grass-merged,dirt-merged,paper-merged,food-other-merged,building-other-merged,rock-merged,wall-other-merged,"
    "rug-merged"
).split(",")
NAMES = (*THINGS, *STUFF)
UNLABELLED = 255


def colour(index: int) -> tuple[int, int, int]:
    """A colour of its own for each id, RGB: neighbouring ids are far apart on the colour wheel; unlabelled is black."""
    if index == UNLABELLED:
        return 0, 0, 0
    hue, light = (index * 0.61803398875) % 1.0, (0.45, 0.6, 0.72)[index % 3]
    r, g, b = colorsys.hls_to_rgb(hue, light, 0.65)
    return round(r * 255), round(g * 255), round(b * 255)
