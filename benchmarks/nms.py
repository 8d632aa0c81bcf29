"""NMS against torchvision's batched_nms: 1,000 to 20,000 boxes of one class or 80, IoU 0.7."""

from functools import partial

import torch
import torchvision
from alternate import compare, op_parser
from common import write_json

from mmdet.ops import batched_nms


def main() -> None:
    args = op_parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    records = []
    for count in (1000, 5000, 20000):
        corner = torch.rand(count, 2) * torch.tensor([1133.0, 600.0])
        boxes = torch.cat([corner, corner + torch.rand(count, 2) * 200], dim=1).to(args.device)
        # All different: torchvision promises no order among equal scores.
        scores = (torch.randperm(count) / count).to(args.device)
        for classes in (1, 80):
            labels = torch.randint(classes, (count,)).to(args.device)
            functions = {
                name: partial(op, boxes, scores, labels, 0.7)
                for name, op in (('torchvision', torchvision.ops.batched_nms), ('mmdet', batched_nms))}
            kept, expected = functions['mmdet'](), functions['torchvision']()
            assert torch.equal(kept, expected), 'the kept boxes differ'
            records += compare(f'{count} boxes, {classes} classes, {len(kept)} kept', functions, args.rounds)
    print('all kept the same boxes')
    write_json(args, records)


if __name__ == '__main__':
    main()
