"""Search the hyperparameters of GLASS with ResNet-50: 100 trials of up to 25 epochs.

    python -m hyperparameter_tuning.glass_resnet_tuning [--preset demo] [--glass-trials N] [--epochs N]

Hardware: one CUDA GPU, and as many CPU cores as there are: at the paper's size, loading images alone takes about
595 core-hours, less what pruning saves (README, Hardware and hours). With --preset demo: minutes on two CPU cores.
Leaves results/<preset>/tuning/glass_resnet/study.db, and prints the best values, to be put into config.py.
"""

from hyperparameter_tuning.study import main

if __name__ == "__main__":
    main("glass_resnet", __doc__)
