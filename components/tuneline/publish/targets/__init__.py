"""The places to which a run publishes, all with the same two steps: check all, then push to each.

place.py      what every kind of place can do
on_hub.py     the Hub (see publish/hub.py)
on_disk.py    a directory or a claim (see publish/directory.py)
in_store.py   a store of files, through fsspec
in_registry.py  an OCI registry, through oras; registry_client.py sends its requests
on_mlflow.py  registered models of MLflow
on_model_registry.py  addresses of what other targets have, in Kubeflow's Model Registry
versions.py   the tags v1, v2 where a place has no history of its own
every.py      one run to all of its places
"""
