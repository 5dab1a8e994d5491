"""Parts of the train_gpt.py demo: data, model, training loop, attention measurements, figures."""
