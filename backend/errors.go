package backend

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strconv"
	"syscall"
	"time"
)

// A StatusError is an answer of a server that is not the one that was asked for.
// It is fs.ErrNotExist or fs.ErrPermission where the code means that.
type StatusError struct {
	Code       int           // HTTP status
	Reason     string        // the registry's own error code, such as MANIFEST_INVALID; "" when it gave none
	RetryAfter time.Duration // how long the server wants to be left alone; 0: it did not say
	URL        string        // as RedactURL leaves it
}

// NewStatusError describes the answer r. It reads nothing of the body.
func NewStatusError(r *http.Response) *StatusError {
	e := &StatusError{Code: r.StatusCode, RetryAfter: retryAfter(r.Header.Get("Retry-After"))}
	if r.Request != nil && r.Request.URL != nil {
		e.URL = RedactURL(r.Request.URL.String())
	}
	return e
}

// retryAfter reads the header of that name: seconds or a date (RFC 9110, 10.2.3).
func retryAfter(v string) time.Duration {
	if s, err := strconv.ParseUint(v, 10, 31); err == nil {
		return time.Duration(s) * time.Second
	}
	if at, err := http.ParseTime(v); err == nil {
		return max(0, time.Until(at))
	}
	return 0
}

// Error says what was asked and what the answer was, without secrets.
func (e *StatusError) Error() string {
	text := fmt.Sprintf("%s: %d %s", e.URL, e.Code, http.StatusText(e.Code))
	if e.Reason != "" {
		text += " (" + e.Reason + ")"
	}
	return text
}

// Is makes the code comparable to fs.ErrNotExist and fs.ErrPermission.
func (e *StatusError) Is(target error) bool {
	switch e.Code {
	case http.StatusNotFound, http.StatusGone:
		return target == fs.ErrNotExist
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusProxyAuthRequired:
		return target == fs.ErrPermission
	}
	return false
}

func (e *StatusError) temporary() bool {
	switch e.Code {
	case http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests:
		return true
	case http.StatusNotImplemented, http.StatusHTTPVersionNotSupported:
		return false
	}
	return e.Code >= 500
}

// A temporaryError is one of our own that knows whether trying again may help.
type temporaryError interface {
	error
	temporary() bool
}

// Temporary reports whether trying again may help: the server is overloaded or
// broken, the connection failed, or something took too long. It is the only
// place that decides this; an error that it does not know is permanent. A
// deadline counts as temporary, so a caller asks its own context first.
func Temporary(err error) bool {
	if errors.Is(err, context.Canceled) {
		return false
	}
	if own, ok := errors.AsType[temporaryError](err); ok {
		return own.temporary()
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return false
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		return !dns.IsNotFound
	}
	for _, broken := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.ECONNREFUSED, syscall.EPIPE} {
		if errors.Is(err, broken) {
			return true
		}
	}
	if _, ok := errors.AsType[*net.OpError](err); ok {
		return true
	}
	timeout, ok := errors.AsType[interface {
		error
		Timeout() bool
	}](err)
	return ok && timeout.Timeout()
}

// CheckRange returns an error unless [off, off+n) lies inside a blob of size bytes.
func CheckRange(off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("%d bytes at %d are outside of the blob, which has %d: %w", n, off, size, fs.ErrInvalid)
	}
	return nil
}

// CheckSize returns an error when ref gives a size and it is not size.
func CheckSize(ref Ref, size int64) error {
	if ref.Size != 0 && ref.Size != size {
		return fmt.Errorf("blob %s has %d bytes where it is stored and %d by its reference: it is cut off or not the same blob", ref.Digest, size, ref.Size)
	}
	return nil
}
