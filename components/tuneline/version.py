"""The version of the distribution, and so of the images and the compiled pipelines."""

VERSION = "0.1.0"
