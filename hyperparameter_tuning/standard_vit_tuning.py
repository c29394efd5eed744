"""Search the hyperparameters of standard transfer learning with ViT-B/16: 50 trials of up to 25 epochs.

    python -m hyperparameter_tuning.standard_vit_tuning [--preset demo] [--standard-trials N] [--epochs N]

Hardware: one CUDA GPU, and as many CPU cores as there are: at the paper's size, loading images alone takes about
253 core-hours, less what pruning saves (README, Hardware and hours). With --preset demo: minutes on two CPU cores.
Leaves results/<preset>/tuning/standard_vit/study.db, and prints the best values, to be put into config.py.
"""

from hyperparameter_tuning.study import main

if __name__ == "__main__":
    main("standard_vit", __doc__)
