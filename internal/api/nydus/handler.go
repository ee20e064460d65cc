package nydus

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
)

// maxBody bounds a request's body. The largest are blob entries.
const maxBody = 1 << 20

// Handler serves s at nydusd's paths, and NoRoute everywhere else. It holds no lock:
// a call that waits makes no other wait. See [Route] for what is served beside it.
func Handler(s Service) http.Handler {
	h := handler{}
	h.daemon(s)
	h.mounts(s)
	h.blobs(s)
	h.metrics(s)
	return h
}

// handler is the endpoints by path and method. Paths match as they were sent: they are
// not decoded, not cleaned, and redirect nowhere.
type handler map[string]map[string]endpoint

// An endpoint is what one method does at a path.
type endpoint struct {
	name string // around the words of its errors
	body bool   // it needs one; the others refuse one
	call func(*request) (answer any, err error)
}

// no is the answer of a call that has none: 204.
type no struct{}

func (h handler) on(method, path string, e endpoint) {
	if h[path] == nil {
		h[path] = map[string]endpoint{}
	}
	h[path][method] = e
}

func (h handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	head := w.Header()
	head.Set("Server", "Nydus API")
	head.Set("Connection", "keep-alive") // unless the server knows better
	methods, known := h[r.URL.EscapedPath()]
	if !known {
		reject(w, "", &Error{Status: http.StatusNotFound, Words: "NoRoute", Bare: true})
		return
	}
	e, known := methods[r.Method]
	if !known {
		reject(w, "", BadRequest(errors.New("not a method of this path")))
		return
	}
	body, err := e.read(w, r)
	if err != nil {
		reject(w, e.name, err)
		return
	}
	req := &request{r, e.name, body}
	answer, err := e.call(req)
	if err != nil {
		reject(w, req.name, err)
		return
	}
	if answer == any(no{}) {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	send(w, http.StatusOK, answer)
}

// reject answers with err as the endpoint of the given name says it.
func reject(w http.ResponseWriter, name string, err error) {
	e := asError(err)
	send(w, e.Status, failure{Code: "UNDEFINED", Message: e.message(name)})
}

// failure is the body of every error.
type failure struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// send answers with v. Clients compare some bodies as a whole: they have no newline at
// the end, and nothing in them is escaped for HTML.
func send(w http.ResponseWriter, status int, v any) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		status = http.StatusInternalServerError
		b.Reset()
		b.WriteString(`{"code":"UNDEFINED","message":"the answer is no JSON"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// A client that left gets no answer, and nobody else is waiting for one.
	_, _ = w.Write(bytes.TrimSuffix(b.Bytes(), []byte("\n")))
}

// Route sends a request to the handler of its path, as it was sent, or of the path's
// longest beginning that is there and ends in a slash, and others to h. Unlike
// [http.ServeMux] it redirects nothing, so what h does not know stays h's to answer.
func Route(h http.Handler, beside map[string]http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path := r.URL.EscapedPath()
		for end := len(path); end > 0; end-- {
			if end < len(path) && path[end-1] != '/' {
				continue
			}
			if other, ok := beside[path[:end]]; ok {
				other.ServeHTTP(w, r)
				return
			}
		}
		h.ServeHTTP(w, r)
	})
}
