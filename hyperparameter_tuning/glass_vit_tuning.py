"""Search the hyperparameters of GLASS with a ViT (paper: ViT-B/16, 100 trials of up to 25 epochs).

    python -m hyperparameter_tuning.glass_vit_tuning [--preset demo] [--trials N] [--epochs N]

Hardware: one CUDA GPU and many CPU cores (hours: docs/hours.md); with --preset demo, minutes on two CPU cores.
Output: results/<preset>/tuning/glass_vit/study.db, and the best values printed, to be copied to config.py.
"""

if __name__ == "__main__":
    from hyperparameter_tuning.study import main

    main("glass_vit", __doc__)
