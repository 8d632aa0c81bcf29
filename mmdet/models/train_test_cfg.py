"""What ``model.train_cfg`` and ``model.test_cfg`` of a two-stage detector hold."""

from typing import Any, Literal, Required, TypedDict


class NMSConfig(TypedDict):
    """Of boxes that overlap by more than ``iou_threshold``, only the best scored stays."""

    type: Literal['nms']
    iou_threshold: float


class RPNTrainConfig(TypedDict, total=False):
    """Assignment and sampling of anchors.

    Those are used that start at most, and end less than, ``allowed_border`` pixels outside the image;
    -1: all.
    """

    assigner: Required[dict[str, Any]]
    sampler: Required[dict[str, Any]]
    allowed_border: float


class ProposalConfig(TypedDict):
    """Which boxes of the RPN become proposals.

    The best ``nms_pre`` of each level (-1: all), larger than ``min_bbox_size`` pixels, compete in each
    level's NMS; the best ``max_per_img`` of all levels stay (-1: all).
    """

    nms_pre: int
    max_per_img: int
    nms: NMSConfig
    min_bbox_size: float


class RCNNTrainConfig(TypedDict, total=False):
    """Assignment and sampling of proposals, and the side of mask targets in pixels."""

    assigner: Required[dict[str, Any]]
    sampler: Required[dict[str, Any]]
    mask_size: int


class RCNNTestConfig(TypedDict, total=False):
    """Which boxes are detections.

    Of those that score above ``score_thr`` and survive their class's NMS, the best ``max_per_img``
    stay (-1: all). From a probability of ``mask_thr_binary`` (default: 0.5) on, a pixel belongs to the mask.
    """

    score_thr: Required[float]
    nms: Required[NMSConfig]
    max_per_img: Required[int]
    mask_thr_binary: float


class TrainConfig(TypedDict):
    """``model.train_cfg``."""

    rpn: RPNTrainConfig
    rpn_proposal: ProposalConfig
    rcnn: RCNNTrainConfig | list[RCNNTrainConfig]


class TestConfig(TypedDict):
    """``model.test_cfg``."""

    rpn: ProposalConfig
    rcnn: RCNNTestConfig
