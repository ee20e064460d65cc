package registry

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"

	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry/remote/errcode"

	"github.com/erofsd/erofsd/backend"
)

// translate turns an error of oras into ours: typed where callers branch, and without
// secrets.
func translate(err error) error {
	if e, ok := errors.AsType[*errcode.ErrorResponse](err); ok {
		status := &backend.StatusError{Code: e.StatusCode, URL: backend.RedactURL(e.URL.String())}
		if len(e.Errors) > 0 && isErrorCode(e.Errors[0].Code) {
			status.Reason = e.Errors[0].Code
		}
		return status
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return fmt.Errorf("%w; give the certificate of its authority, or set skip_verify", backend.RedactError(err))
	}
	switch {
	case errors.Is(err, errdef.ErrNotFound):
		return fmt.Errorf("%w: %w", backend.RedactError(err), fs.ErrNotExist)
	}
	return err
}

// isErrorCode reports whether s looks like a code of the distribution
// specification. What else a server says may echo what it was sent.
func isErrorCode(s string) bool {
	for _, c := range s {
		if c != '_' && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return len(s) <= 40
}
