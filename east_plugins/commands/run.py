from ..upstream.launch import main as main
