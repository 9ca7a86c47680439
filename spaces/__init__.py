"""The Space that lets people try a trained model beside its base; `papertrl.hub.space` renders it."""
