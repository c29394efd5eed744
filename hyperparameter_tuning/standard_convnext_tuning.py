"""Search the hyperparameters of a standard model with a ConvNeXt (paper: ConvNeXt-Tiny, 50 trials of up to 25 epochs).

    python -m hyperparameter_tuning.standard_convnext_tuning [--preset demo] [--trials N] [--epochs N]

Hardware: one CUDA GPU and many CPU cores (hours: docs/hours.md); with --preset demo, minutes on two CPU cores.
Output: results/<preset>/tuning/standard_convnext/study.db, and the best values printed, to be copied to config.py.
"""

if __name__ == "__main__":
    from hyperparameter_tuning.study import main

    main("standard_convnext", __doc__)
