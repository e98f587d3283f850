import os
import sys

from megakrause.cli import main

if __name__ == "__main__":
    code = main()
    torch = sys.modules.get("torch")  # which commands that do not need it do not import
    if torch is not None and torch.distributed.is_initialized():
        if code == 0:
            torch.distributed.destroy_process_group()  # else NCCL warns
        else:  # others may never come to that, and threads of groups that the interpreter takes down may abort
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)
