"""Masks of boxes pasted into the image and run-length encoded (Mask R-CNN, arXiv 1703.06870, section 3.1)."""
import torch
from torch import Tensor


def paste_masks(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """COCO RLE of the pixels whose sampled probability is >= `threshold`, without an image per mask.

    Args:
        masks: `(N, M, M)` probabilities. Half precision is computed in float32, float64 in itself.
        boxes: `(N, 4)` xyxy in pixels. One without area, or that is not finite, gives an empty mask.
        height, width: size of the image.

    Returns:
        The texts of the run lengths one after the other, uint8, and the length of each text `(N,)` int64,
        both on the CPU. They are, bit by bit, `F.grid_sample(align_corners=False)` on a CPU with fused
        multiply-add (AVX2 and later), at the pixels up to one outside the box, encoded by pycocotools; on a
        GPU as well.

    Raises:
        ValueError: on a wrong shape, mixed devices or an image without pixels. TypeError: on integer masks or
        boxes.
    """
    return torch.ops.mmdet.paste_masks(masks, boxes, height, width, threshold)


@torch.library.register_fake('mmdet::paste_masks')
def _(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return (torch.empty(size, dtype=torch.uint8, device='cpu'),
            torch.empty(masks.shape[0], dtype=torch.int64, device='cpu'))
