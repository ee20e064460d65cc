package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
)

// maxBody bounds a request's body: all of them are a few paths.
const maxBody = 1 << 20

// Handler serves s over HTTP:
//
//	POST /v1/mount    MountRequest   → Mount
//	POST /v1/unmount  UnmountRequest → {}
//	POST /v1/remove   RemoveRequest  → {}
//	GET  /v1/status                  → Status
func Handler(s Service) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/mount", func(w http.ResponseWriter, r *http.Request) {
		var req MountRequest
		if decode(w, r, &req) {
			m, err := s.Mount(r.Context(), req)
			answer(w, m, err)
		}
	})
	mux.HandleFunc("POST /v1/unmount", func(w http.ResponseWriter, r *http.Request) {
		var req UnmountRequest
		if decode(w, r, &req) {
			answer(w, struct{}{}, s.Unmount(r.Context(), req))
		}
	})
	mux.HandleFunc("POST /v1/remove", func(w http.ResponseWriter, r *http.Request) {
		var req RemoveRequest
		if decode(w, r, &req) {
			answer(w, struct{}{}, s.Remove(r.Context(), req))
		}
	})
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		st, err := s.Status(r.Context())
		answer(w, st, err)
	})
	return mux
}

// decode reads r's body strictly into v; when it cannot it answers r and
// returns false.
func decode(w http.ResponseWriter, r *http.Request, v any) bool {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		answer(w, nil, BadRequest(fmt.Errorf("decode request: %w", err)))
		return false
	}
	return true
}

func answer(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		status := http.StatusInternalServerError
		if e := (*Error)(nil); errors.As(err, &e) {
			status = e.Status
		}
		w.WriteHeader(status)
		v = &Error{Message: err.Error()}
	}
	// A client that left gets no answer, and nobody else is waiting for one.
	_ = json.NewEncoder(w).Encode(v)
}
