"""The version of the distribution, which the images and the compiled pipelines have too."""

VERSION = "0.1.0"
