from ..upstream.patching import main as main
