"""Search the hyperparameters of GLASS with ResNet-50: 100 trials of up to 25 epochs.

    python -m hyperparameter_tuning.glass_resnet_tuning [--preset demo] [--glass-trials N] [--epochs N]

@TIME@
Leaves results/<preset>/tuning/glass_resnet/study.db, and prints the best values, to be put into config.py.
"""

from hyperparameter_tuning.study import main

if __name__ == "__main__":
    main("glass_resnet", __doc__)
