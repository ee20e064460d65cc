package nydus

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"reflect"
	"strings"
	"unicode/utf8"
)

// A request is one that has the right method and, where one is wanted, a body.
type request struct {
	*http.Request
	name string // of its endpoint, as errors say it
	body []byte
}

// read reads r's body, in whatever form it comes, and checks that there is one when
// there should be.
func (e endpoint) read(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	switch {
	case errors.As(err, new(*http.MaxBytesError)):
		return nil, BadRequest(fmt.Errorf("the body is longer than %d bytes", maxBody))
	case err != nil:
		return nil, BadRequest(errors.New("the body ends early or its encoding is wrong"))
	case e.body && len(body) == 0:
		return nil, BadRequest(errors.New("this call needs a body"))
	case !e.body && len(body) > 0:
		return nil, BadRequest(errors.New("this call takes no body"))
	}
	return body, nil
}

// query returns the first value of key, and whether there is one. What is no valid
// encoding stands for itself.
func (r *request) query(key string) (string, bool) {
	for pair := range strings.SplitSeq(r.URL.RawQuery, "&") {
		k, v, _ := strings.Cut(pair, "=")
		if unescape(k) == key {
			return unescape(v), true
		}
	}
	return "", false
}

func unescape(s string) string {
	if u, err := url.QueryUnescape(s); err == nil {
		return u
	}
	return s
}

// value is query's value, empty when there is none.
func (r *request) value(key string) string {
	v, _ := r.query(key)
	return v
}

// need is query's value, or what a client without it is told.
func (r *request) need(key string) (string, error) {
	v, given := r.query(key)
	if !given {
		return "", missingQuery(key)
	}
	return v, nil
}

// decode reads the body, one JSON document, into v. Keys that v does not have are
// ignored. The error repeats nothing of the body: there may be secrets in it.
func (r *request) decode(v any) error {
	if !utf8.Valid(r.body) {
		return r.parseError("invalid unicode code point", len(r.body))
	}
	err := json.Unmarshal(r.body, v)
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &syntax) && strings.HasPrefix(syntax.Error(), "unexpected end"):
		return r.parseError("EOF while parsing a value", len(r.body))
	case errors.As(err, &syntax):
		return r.parseError("expected value", int(syntax.Offset))
	case errors.As(err, &kind):
		got, _, _ := strings.Cut(kind.Value, " ") // without the number itself
		return r.parseError("invalid type: "+got+", expected "+shape(kind.Type.Kind()), int(kind.Offset))
	}
	return r.parseError("invalid value", len(r.body))
}

// shape is the JSON value that goes into a Go value of kind k.
func shape(k reflect.Kind) string {
	switch k {
	case reflect.String:
		return "a string"
	case reflect.Slice:
		return "a sequence"
	default:
		return "an object"
	}
}

// missing is a body without a key that it needs.
func (r *request) missing(key string) error {
	return r.parseError("missing field `"+key+"`", len(r.body))
}

// parseError is ParseBody at the given offset, the number of bytes that were read.
func (r *request) parseError(text string, offset int) error {
	before := r.body[:min(offset, len(r.body))]
	return ParseBody(text, 1+bytes.Count(before, []byte("\n")), len(before)-1-bytes.LastIndexByte(before, '\n'))
}
