"""Whether timm can get the weights of a model, found out at once: its own way to the hub tries for most of a minute."""

from __future__ import annotations

SECONDS = 10.0
"""So long may the hub take to answer."""


def no_network(model: str) -> str | None:
    """Why the hub cannot be asked for the weights of timm's `model`; None if it can, or need not be.

    It need not if the weights are in the local cache, or come from elsewhere. Whether the hub has them is not asked.
    """
    import timm
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    found = timm.get_pretrained_cfg(model)
    if found is None or found.file or not found.hf_hub_id:
        return None
    repository, _, revision = found.hf_hub_id.partition("@")
    names = ("model.safetensors", "pytorch_model.bin") if found.hf_hub_filename is None else (found.hf_hub_filename,)
    if any(isinstance(try_to_load_from_cache(repository, name, revision=revision or None), str) for name in names):
        return None
    try:
        get_hf_file_metadata(hf_hub_url(repository, names[0], revision=revision or None), timeout=SECONDS)
    except HfHubHTTPError:
        return None  # it answered: what it says, timm will hear too
    except Exception as cause:  # a name that is not resolved, no route, a time-out, the offline mode of the library, ...
        return f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else 'no answer'}"
    return None
