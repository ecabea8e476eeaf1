"""How the nano model in assets/nano/ is made: pictures, looks, pool, training, export.

Each step is a command (`python -m training.data`, `python -m training.pool`, ...), resumes where it stopped
and draws everything from fixed seeds. Nothing in `uso/` imports this package. Big intermediate files live in
the folder named by the environment variable USO_TRAIN_CACHE (default: training/cache/).
"""
