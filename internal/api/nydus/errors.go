package nydus

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
)

// An Error is an answer other than success.
type Error struct {
	Status int // of HTTP
	// Words are nydusd's, which clients match; the handler puts the name of the
	// endpoint around them unless Bare.
	Words string
	Bare  bool
	Cause error // for a person: what was wrong and what to do. May be nil
}

func (e *Error) Error() string {
	if e.Cause == nil {
		return e.Words
	}
	return e.Words + ": " + e.Cause.Error()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// message is what a client gets from the endpoint of the given name.
func (e *Error) message(endpoint string) string {
	words := e.Words
	if !e.Bare {
		words = endpoint + "(" + words + ")"
	}
	if e.Cause == nil {
		return words
	}
	return words + ": " + e.Cause.Error()
}

// asError returns err itself, or what stands for an error that is not of this package.
func asError(err error) *Error {
	if e := (*Error)(nil); errors.As(err, &e) {
		return e
	}
	return &Error{Status: http.StatusInternalServerError, Words: other(err.Error())}
}

func other(text string) string { return "DaemonAbnormal(Other(" + strconv.Quote(text) + "))" }

// Unsupported is a call that the daemon does not offer in its mode.
func Unsupported() error {
	return &Error{Status: http.StatusNotImplemented, Words: "DaemonAbnormal(Unsupported)"}
}

// NotReady is a call that came too early or too late.
func NotReady() error {
	return &Error{Status: http.StatusServiceUnavailable, Words: "DaemonAbnormal(NotReady)"}
}

// UnexpectedEvent is an event that the state does not allow: Start, Takeover.
func UnexpectedEvent(event string) error {
	return &Error{Status: http.StatusBadRequest, Words: "DaemonAbnormal(UnexpectedEvent(" + strconv.Quote(event) + "))"}
}

// BadRequest is a request that is wrong in itself; err, which may be nil, says how.
func BadRequest(err error) error {
	return &Error{Status: http.StatusBadRequest, Words: "BadRequest", Bare: true, Cause: err}
}

// ParseBody is a body that cannot be read: text says why, without any of its values.
// Line and column count from 1.
func ParseBody(text string, line, column int) error {
	words := fmt.Sprintf("ParseBody(Error(%q, line: %d, column: %d))", text, line, column)
	return &Error{Status: http.StatusBadRequest, Words: words, Bare: true}
}

// missingQuery is a request without a parameter that it needs.
func missingQuery(key string) error {
	words := fmt.Sprintf("QueryString(\"'%s' should be specified in query string\")", key)
	return &Error{Status: http.StatusBadRequest, Words: words, Bare: true}
}

// Invalid is a value that the daemon cannot take; err says which.
func Invalid(err error) error {
	return &Error{Status: http.StatusInternalServerError, Words: other("Invalid argument (os error 22)"), Cause: err}
}

// IO is a file or directory that cannot be used.
func IO(err error) error {
	return &Error{Status: http.StatusInternalServerError, Words: other("Input/output error (os error 5)"), Cause: err}
}

// NoCounter is about an id of which nothing is counted. Clients compare the whole text.
func NoCounter() error {
	return &Error{Status: http.StatusNotFound, Words: "Metrics(Stats(NoCounter))"}
}

// NoEntry is about something that is not registered, what. Nydus-snapshotter takes it for
// success by the words of the cause.
func NoEntry(what string) error {
	return &Error{
		Status: http.StatusInternalServerError, Words: other("No such file or directory (os error 2)"),
		Cause: fmt.Errorf("blob_cache: cache entry not found: %s", what),
	}
}

// Exists is a registration that contradicts an earlier one; err says how.
func Exists(err error) error {
	return &Error{
		Status: http.StatusInternalServerError, Words: other("blob_cache: bootstrap blob already exists"), Cause: err,
	}
}

// MissingSupervisor is a takeover without a supervisor.
func MissingSupervisor() error { return UpgradeFailed(`"MissingSupervisorPath"`, nil) }

// NoFDs is a state that cannot be given away since there is no device in it.
func NoFDs() error { return UpgradeFailed("StorageBackendError(NoEnoughFds)", nil) }

// UpgradeFailed is a state that could not be sent, fetched or restored; words are
// nydusd's, err says why.
func UpgradeFailed(words string, err error) error {
	return &Error{
		Status: http.StatusInternalServerError, Words: "DaemonAbnormal(UpgradeManager(" + words + "))", Cause: err,
	}
}

// CullFailed is a cache file that could not be removed; err says why.
func CullFailed(err error) error {
	return &Error{
		Status: http.StatusInternalServerError, Words: other("failed to cull blob objects from fscache"), Cause: err,
	}
}

// MountFailed is a file system that could not be mounted; err says why.
func MountFailed(err error) error {
	return &Error{
		Status: http.StatusInternalServerError, Words: "MountFilesystem(Other(" + strconv.Quote(err.Error()) + "))",
	}
}
