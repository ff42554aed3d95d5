"""Parts of the Gradio app. `app.py` alone imports them, inside the command that needs them."""
