-- Measurements of the members from {first} to {last} days after the index date.
SELECT
    CAST(c.subject_id AS VARCHAR) AS patient,
    CAST(c.index_date AS VARCHAR) AS index_date,
    CAST(CAST(e.measurement_date AS DATE) AS VARCHAR) AS day,
    CAST(CAST(e.measurement_datetime AS TIMESTAMP) AS VARCHAR) AS moment,
    CAST(e.measurement_concept_id AS VARCHAR) AS concept,
    CAST(e.value_as_number AS VARCHAR) AS value,
    CAST(e.unit_concept_id AS VARCHAR) AS unit_concept,
    CAST(e.unit_source_value AS VARCHAR) AS unit
FROM (
    SELECT DISTINCT subject_id, CAST(cohort_start_date AS DATE) AS index_date
    FROM cohort
    WHERE cohort_definition_id = {cohort}
) c
JOIN measurement e ON e.person_id = c.subject_id
WHERE CAST(e.measurement_date AS DATE) BETWEEN c.index_date + ({first}) AND c.index_date + ({last})
    AND ({every} = 1 OR e.measurement_concept_id IN ({concepts}))
