"""Pictures with the objects that they show: boxes and outlines as COCO, YOLO, Pascal VOC and LabelMe write them."""
