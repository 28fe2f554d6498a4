"""`grip-hf serve`: `transformers serve` with a pruned model, for one machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options
from .screen import failures, say


def serve(
    pocket: options.Pocket = False,
    testbed: options.Testbed = options.TESTBED,
    model: options.Model = None,
    scorer: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a scorer; else the one of the model.")
    ] = None,
    selector: Annotated[str | None, typer.Option(help="Or: a selector that needs no scorer.")] = None,
    budgets: Annotated[
        str | None, typer.Option(help="A keep ratio or a number of visual tokens; else the one of the scorer.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    attn_implementation: options.Attention = None,
    force: options.Force = False,
) -> None:
    """Serve a pruned model with the API of OpenAI's chat completions, one request after the other.

    The server is that of transformers (pip install 'grip-hf[serve]'). Every model that it loads is pruned; one that
    cannot be is refused.
    """
    if pocket == (model is not None):
        raise typer.BadParameter("give either --pocket or --model")
    if quantize not in (None, "4bit", "8bit"):
        raise typer.BadParameter(f"--quantize must be 4bit or 8bit, got {quantize!r}")
    settings = _budget(budgets) | {"scorer": scorer, "selector": selector, "force": force}
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise typer.BadParameter("the server needs more packages: pip install 'grip-hf[serve]'")
    from transformers.cli.serve import Serve

    from ..patch import apply_grip
    from ..pocket.testbeds import get_testbed

    class PrunedServe(Serve):
        """Transformers' server, whose models are pruned before anyone gets them."""

        def start_server(self) -> None:
            """Prune what is loaded, and what will be; then listen until the program is stopped."""
            manager, plain = self._model_manager, self._model_manager.load_model_and_processor

            def load(*args: Any, **kwargs: Any) -> Any:
                found, processor = plain(*args, **kwargs)
                if not hasattr(found, "grip"):
                    apply_grip(found, **settings)
                return found, processor

            manager.load_model_and_processor = load  # type: ignore[method-assign]  # of this object, not its class
            found, _ = load(manager.process_model_name(str(manager.force_model)))
            say(f'{found.grip}\nhttp://{host}:{port}/v1/chat/completions, model "{manager.force_model}"')
            self.server.run()

    with failures():
        try:
            PrunedServe(
                force_model=str(get_testbed(testbed).weights) if model is None else model,
                host=host,
                port=port,
                device=device,
                dtype=dtype,
                attn_implementation=attn_implementation,
                quantization=quantize and f"bnb-{quantize}",
                non_blocking=True,  # calls `start_server`
            )
        except (OSError, ValueError) as error:
            from ..errors import GripError, SourceError

            if isinstance(error, GripError):
                raise
            raise SourceError(f"{model or 'the pocket model'} cannot be served: {error}") from error


def _budget(text: str | None) -> dict[str, Any]:
    """The budget as settings of `apply_grip`."""
    from .screen import budget_list

    if text is None:
        return {}
    from ..evaluation.budgets import as_setting

    found = budget_list(text)
    if len(found) != 1:
        raise typer.BadParameter(f"--budgets takes one budget here, got {text!r}")
    return as_setting(found[0])
