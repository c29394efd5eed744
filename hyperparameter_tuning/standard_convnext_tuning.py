"""Search the hyperparameters of standard transfer learning with ConvNeXt-Tiny: 50 trials of up to 25 epochs.

    python -m hyperparameter_tuning.standard_convnext_tuning [--preset demo] [--standard-trials N] [--epochs N]

@TIME@
Leaves results/<preset>/tuning/standard_convnext/study.db, and prints the best values, to be put into config.py.
"""

from hyperparameter_tuning.study import main

if __name__ == "__main__":
    main("standard_convnext", __doc__)
