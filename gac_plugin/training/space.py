"""The files of a Space, the Hub's place for demos, that shows a generator which stands on the Hub."""

import yaml

from gac_plugin import __version__
from gac_plugin.training.remote import require_repo_id

SPACE_SDK = "gradio"
SDK_VERSION = "6.31.0"
"""Of gradio; the one that the page was tested with."""
APP = '''"""Samples, refinement and latent walks of a generator, in the browser."""

from gac_plugin.demo import launch

launch({model!r})
'''


def space_files(repo_id: str) -> dict[str, bytes]:
    """What the Space of a generator holds.

    Args:
        repo_id: of the model on the Hub, "user/name".

    Returns:
        Path in the Space -> content: the app, what it needs installed, and README.md, whose head tells the Hub how to
        run it.

    Raises:
        UsageError: `repo_id` is not the name of a repository.
    """
    require_repo_id(repo_id)
    name = repo_id.split("/")[-1]
    head = {
        "title": f"Samples of {name}",
        "emoji": "🎲",
        "colorFrom": "indigo",
        "colorTo": "purple",
        "sdk": SPACE_SDK,
        "sdk_version": SDK_VERSION,
        "app_file": "app.py",
        "models": [repo_id],
        "pinned": False,
    }
    text = (
        f"Samples, refinement and latent walks of the generator [{repo_id}](https://huggingface.co/{repo_id}), which "
        "was trained with gac-plugin: gradient ascent along the discriminator's conjugate gradient direction.\n"
    )
    readme = f"---\n{yaml.safe_dump(head, allow_unicode=True, sort_keys=False)}---\n\n# Samples of {name}\n\n{text}"
    files = {"app.py": APP.format(model=repo_id), "requirements.txt": f"gac-plugin[demo]>={__version__}\n"}
    return {path: content.encode() for path, content in (files | {"README.md": readme}).items()}
