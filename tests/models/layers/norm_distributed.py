"""RANK WORLD FOLDER: one of some gloo processes that run SyncBatchNorm on the cases of FOLDER/cases.pt."""

import sys

import torch
import torch.distributed as dist

from mmdet.models.layers.norm import SyncBatchNorm

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world)
results = []
for case in torch.load(f'{folder}/cases.pt'):
    norm = SyncBatchNorm(case['state']['weight'].numel()).to(case['state']['weight'].dtype)
    norm.load_state_dict(case['state'])
    outputs, gradients = [], []
    for x, weight in case['steps'][rank]:
        x = x.requires_grad_()
        out = norm(x)
        (out * weight).sum().backward()
        outputs.append(out.detach())
        gradients.append(x.grad)
    result = dict(outputs=outputs, gradients=gradients, weight=norm.weight.grad, bias=norm.bias.grad,
                  state=norm.state_dict(), eval=norm.eval()(case['steps'][rank][0][0]).detach())
    results.append(result)
torch.save(results, f'{folder}/result_{rank}.pt')
dist.destroy_process_group()
