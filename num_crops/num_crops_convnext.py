"""Memory, time and accuracy of GLASS with ConvNeXt-Tiny for K = 1 to 16 crops, 25 epochs each.

    python -m num_crops.num_crops_convnext [--preset demo] [--quick] [--crop-counts 1 4 16]

Hardware: one CUDA GPU, and as many CPU cores as there are: at the paper's size, loading images alone takes about
95 core-hours (README, Hardware and hours). With --preset demo: minutes on two CPU cores.
Leaves results/<preset>/num_crops/glass_convnext/<full or quick>/costs.csv, and prints the fitted lines.
"""

from num_crops.sweep import main

if __name__ == "__main__":
    main("glass_convnext", __doc__)
