"""FID and CLIP score on COCO captions."""
