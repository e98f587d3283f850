import sys

from megakrause.cli import main

code = main()
torch = sys.modules.get("torch")  # which commands that do not need it do not import
if code == 0 and torch is not None and torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()  # else NCCL warns; after a failure others may never come to it
sys.exit(code)
