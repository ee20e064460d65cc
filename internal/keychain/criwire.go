package keychain

import "google.golang.org/protobuf/encoding/protowire"

// pullRequest is what matters of a runtime.v1.PullImageRequest. It is read by hand: the
// generated types of the whole CRI are megabytes of the binary, for seven fields.
type pullRequest struct {
	image string
	auth  criAuth
}

// criAuth is a runtime.v1.AuthConfig.
type criAuth struct {
	username, password, auth, server, registryToken string
}

// parsePull reads a PullImageRequest as far as it is well-formed.
func parsePull(p []byte) (r pullRequest) {
	fields(p, func(n protowire.Number, v []byte) {
		switch n {
		case 1: // image
			fields(v, func(n protowire.Number, v []byte) {
				if n == 1 { // image
					r.image = string(v)
				}
			})
		case 2: // auth
			fields(v, func(n protowire.Number, v []byte) {
				switch n {
				case 1: // username
					r.auth.username = string(v)
				case 2: // password
					r.auth.password = string(v)
				case 3: // auth
					r.auth.auth = string(v)
				case 4: // server_address
					r.auth.server = string(v)
				case 6: // registry_token
					r.auth.registryToken = string(v)
				}
			})
		}
	})
	return r
}

// fields calls each for every field of a message with a length: strings and messages.
func fields(p []byte, each func(n protowire.Number, v []byte)) {
	for len(p) > 0 {
		n, typ, size := protowire.ConsumeTag(p)
		if size < 0 {
			return
		}
		p = p[size:]
		if typ == protowire.BytesType {
			if v, vn := protowire.ConsumeBytes(p); vn >= 0 {
				each(n, v)
			}
		}
		if size = protowire.ConsumeFieldValue(n, typ, p); size < 0 {
			return
		}
		p = p[size:]
	}
}
