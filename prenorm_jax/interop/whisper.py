"""Whisper in transformers' own format, as a role table: no model here is an encoder and decoder.

    new = convert_foreign(tensors, WHISPER, None)    # tensors by their names, as model.safetensors has them

The encoder's final norm feeds the keys and values of every decoder layer. No key has a bias, and none needs one: keys
are not turned. Networks of RMSNorms have to centre what enters the encoder, whose stem ends in a GELU, and what the
tied token embedding gives, once each. The library's own, of LayerNorms, computes the same with and without.
"""

WHISPER = """
model.encoder.conv1.weight                                        mlp channel other
model.encoder.conv1.bias                                          mlp
model.encoder.conv2.weight                                        raw mlp other        # before a GELU
model.encoder.conv2.bias                                          raw
model.encoder.embed_positions.weight                              position write
model.encoder.layers.{i}.self_attn_layer_norm.{weight,bias}       {scale,bias}         enc{i}.attn
model.encoder.layers.{i}.self_attn.{q,v}_proj.weight              heads read           enc{i}.attn
model.encoder.layers.{i}.self_attn.k_proj.weight                  heads read           enc{i}.attn   -
model.encoder.layers.{i}.final_layer_norm.{weight,bias}           {scale,bias}         enc{i}.mlp
model.encoder.layers.{i}.fc1.weight                               mlp read             enc{i}.mlp
model.encoder.layer_norm.{weight,bias}                            {scale,bias}         memory
model.decoder.embed_tokens.weight                                 vocab raw            # tied
model.decoder.embed_positions.weight                              position write
model.decoder.layers.{i}.self_attn_layer_norm.{weight,bias}       {scale,bias}         dec{i}.attn
model.decoder.layers.{i}.self_attn.{q,v}_proj.weight              heads read           dec{i}.attn
model.decoder.layers.{i}.self_attn.k_proj.weight                  heads read           dec{i}.attn   -
model.decoder.layers.{i}.encoder_attn_layer_norm.{weight,bias}    {scale,bias}         dec{i}.cross
model.decoder.layers.{i}.encoder_attn.q_proj.weight               heads read           dec{i}.cross
model.decoder.layers.{i}.encoder_attn.v_proj.weight               heads read           memory
model.decoder.layers.{i}.encoder_attn.k_proj.weight               heads read           memory        -
model.decoder.layers.{i}.encoder_attn.{q,v,out}_proj.bias         {heads,heads,write}
model.decoder.layers.{i}.encoder_attn.out_proj.weight             write heads
model.decoder.layers.{i}.final_layer_norm.{weight,bias}           {scale,bias}         dec{i}.mlp
model.decoder.layers.{i}.fc1.weight                               mlp read             dec{i}.mlp
model.decoder.layer_norm.{weight,bias}                            raw                  # before the tied table
model.{encoder,decoder}.layers.{i}.self_attn.{q,v,out}_proj.bias  {heads,heads,write}
model.{encoder,decoder}.layers.{i}.self_attn.out_proj.weight      write heads
model.{encoder,decoder}.layers.{i}.fc1.bias                       mlp
model.{encoder,decoder}.layers.{i}.fc2.weight                     write mlp
model.{encoder,decoder}.layers.{i}.fc2.bias                       write
"""
