package backend

import (
	"regexp"
	"strings"
)

var (
	userinfo = regexp.MustCompile(`//[^/?#\s"]*@`)
	query    = regexp.MustCompile(`\?[^\s"]+`)
)

// RedactURL returns u without what may be secret: userinfo, query, fragment.
func RedactURL(u string) string {
	if i := strings.IndexAny(u, "?#"); i >= 0 {
		u = u[:i]
	}
	return userinfo.ReplaceAllString(u, "//")
}

// RedactError returns err with the same text, less the userinfo and queries of
// the URLs in it. errors.Is and errors.As see err itself; an error taken out
// with them is not redacted, so do not print it.
func RedactError(err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	clean := query.ReplaceAllString(userinfo.ReplaceAllString(text, "//"), "")
	if clean == text {
		return err
	}
	return &redactedError{text: clean, err: err}
}

type redactedError struct {
	text string
	err  error
}

func (e *redactedError) Error() string { return e.text }
func (e *redactedError) Unwrap() error { return e.err }
